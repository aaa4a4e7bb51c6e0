"""Typed settings from defaults, one YAML file and `key=value` arguments."""

from manyviews.config.reading import dump_yaml, load, validate
from manyviews.config.settings import Key, Settings, as_list, field_at, help_text, keys, to_args

__all__ = ["Key", "Settings", "as_list", "dump_yaml", "field_at", "help_text", "keys", "load", "to_args", "validate"]
