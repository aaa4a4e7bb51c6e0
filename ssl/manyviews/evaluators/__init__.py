"""How good features are: extracted once, then measured by neighbours and by a linear probe, beside baselines."""
