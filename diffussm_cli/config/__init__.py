"""Turns a preset and overrides into one checked, frozen configuration. No torch, so errors and
`--help` are quick.

fields.py      the fields, with their defaults, help and bounds
metrics.py     what is known of each metric of `diffussm eval`
mixers.py      what is known of each layer that mixes tokens: its fields, and what it needs
presets.py     presets and YAML files by name, with `base` and overrides
reading.py     plain values to fields and back; values.py checks each of them
checks.py      which fields fit together; unused.py: which have no use
arguments.py   the same bounds for those who make a network or a process themselves
plain_yaml.py  YAML that cannot do harm
"""

from diffussm_cli.config.arguments import check_arguments
from diffussm_cli.config.fields import (
    BUILTIN,
    DEFAULT_VAE,
    HUB,
    MANY,
    MAX_CLASSES,
    MAX_SEED,
    NOT_OF_DIT,
    PYTHON,
    SAMPLERS,
    SECTIONS,
    WIDTHS,
    Config,
    DataConfig,
    DiffusionConfig,
    EvalConfig,
    ModelConfig,
    SampleConfig,
    SamplerName,
    TrainConfig,
    field_names,
)
from diffussm_cli.config.metrics import METRIC_FACTS, METRICS, USUAL_METRICS
from diffussm_cli.config.mixers import MIXER_FACTS, MIXER_FIELDS, mixer_names, mixers_with
from diffussm_cli.config.plain_yaml import MAX_YAML_BYTES, parse_yaml, read_text
from diffussm_cli.config.presets import (
    BUNDLED,
    CONFIG,
    DEFAULT_PRESET,
    RUNS,
    bundled_names,
    first_reading,
    load_config,
    preset_names,
    preset_text,
    preset_title,
    run_folders,
    set_fields,
)
from diffussm_cli.config.reading import config_from_dict, read_section, shown, to_dict, to_yaml
from diffussm_cli.config.unused import unused_arguments, unused_fields, unused_of_request
from diffussm_cli.config.values import (
    check_text,
    check_whole,
    closest,
    is_truth_value,
    named_columns,
    nearest,
    whole_number,
)
