"""YAML to validated specs: grids, searches and claims.

yaml_file (safe reading), presets (of how trainers step), spellings (of precisions and the like), document (name, title,
base), levels (of a factor), grid (file to trials), imported (training file to grid file), search and search_file
(search spaces), claims (what is to be shown), preflight (what trials need from the machine), json_schema (for editors).
"""

__all__ = [
    "claims",
    "document",
    "grid",
    "imported",
    "json_schema",
    "preflight",
    "presets",
    "search",
    "search_file",
    "yaml_file",
]
