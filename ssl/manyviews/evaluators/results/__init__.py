"""What evaluators measured: one record for every number, its intervals, and tables of them."""
