"""Handle settings: declared once, read as text from YAML and KEY=VALUE, typed by the schema, checked all at once.

A `Config` is a tree of frozen dataclasses, one per section. Everything else about a setting (text, type, bounds,
default) follows from its single declaration. Layers of settings are flat, `{"optim.lr": "0.1"}`, and later layers win:
defaults < `base:` file < `-c` file < command line.
"""

from repan_cli.config.files import dump, find_preset, parse_assignments, parse_yaml, presets, read_file
from repan_cli.config.resolve import Resolved, build, data_given, resolve, typed
from repan_cli.config.schema import Layer, as_text
from repan_cli.config.settings import (
    DECLARED,
    OVERLAY,
    POLICIES,
    PREVIOUS,
    RECIPES,
    SCHEMA,
    BlockConfig,
    Config,
    CycleConfig,
    DataConfig,
    EmaConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TeacherConfig,
    baseline_phase,
    flatten,
    from_flat,
    replace,
)

__all__ = [
    "DECLARED",
    "OVERLAY",
    "POLICIES",
    "PREVIOUS",
    "RECIPES",
    "SCHEMA",
    "BlockConfig",
    "Config",
    "CycleConfig",
    "DataConfig",
    "EmaConfig",
    "Layer",
    "ModelConfig",
    "OptimConfig",
    "Resolved",
    "RunConfig",
    "TeacherConfig",
    "as_text",
    "baseline_phase",
    "build",
    "data_given",
    "dump",
    "find_preset",
    "flatten",
    "from_flat",
    "parse_assignments",
    "parse_yaml",
    "presets",
    "read_file",
    "replace",
    "resolve",
    "typed",
]
