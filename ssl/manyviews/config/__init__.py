"""Typed settings, read from defaults, one YAML file and `key=value` words; knows nothing of machine learning."""

from manyviews.config.keys import Key, help_text, keys
from manyviews.config.reading import dump_yaml, load, validate
from manyviews.config.settings import Settings, as_list, field_at

__all__ = ["Key", "Settings", "as_list", "dump_yaml", "field_at", "help_text", "keys", "load", "validate"]
