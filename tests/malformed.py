"""Grid files that must be refused, each with what the one line of the refusal must say."""

from __future__ import annotations

BASE = "base: {base_model: random:tiny}\n"

_LETTERS = "abcdefghij"
# Ten factors of ten levels: 10**10 trials, which nobody may begin to list.
_TOO_MANY = (
    BASE
    + "design: grid\nvary:\n"
    + "".join(
        f"  factor {letter}: {{{', '.join(f'{letter}{n}: {{lora_r: {n + 1}}}' for n in range(10))}}}\n"
        for letter in _LETTERS
    )
)
# Nine aliases of nine aliases of …: 9**10 values in half a kilobyte.
_BOMB = "a: &a [x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip(_LETTERS, "bcdefghijk", strict=True)
)
_MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{after}: &{after} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, after in zip(_LETTERS, "bcdefghijk", strict=True)
)


def _base(keys: str) -> str:
    return f"base: {{base_model: random:tiny, {keys}}}\n"


def _data(path: str, type_: str = "") -> str:
    return _base(f"datasets: [{{path: {path}{', type: {' + type_ + '}' if type_ else ''}}}]")


# Datasets that the cases below name, written next to the grid.
FILES: dict[str, str | bytes] = {
    "renamed.jsonl": '{"plot": "A fox.", "tale": "It ran."}\n',
    "empty.jsonl": "",
    "blank_lines.jsonl": "\n\n  \n",
    "header_only.csv": "synopsis,short_story\n",
    "broken.jsonl": '{"synopsis": "A fox.", "short_story": "It ran."}\n{"synopsis": "A hen.", \n',
    "number.jsonl": '{"synopsis": "A fox.", "short_story": "It ran."}\n{"synopsis": 7, "short_story": "It ran."}\n',
    "null.jsonl": '{"synopsis": "A fox.", "short_story": null}\n',
    "spaces.csv": "synopsis,short_story\nA fox.,  \n",
    "surrogate.jsonl": '{"synopsis": "A \\ud800 fox.", "short_story": "It ran."}\n',
    "not_rows.json": '{"synopsis": "A fox.", "short_story": "It ran."}',
    "list_of_text.json": '["A fox."]',
    "deep.json": "[" * 100_000,
    "shifted.csv": "synopsis,short_story\nA fox, red, It ran.\nA hen, blue, It sat.\n",
    "junk.parquet": b"PAR1\x00\xff\x00 nothing of the kind",
    "quotes.csv": 'synopsis,short_story\n"A fox" barks,It ran.\n',
    "latin1.csv": "synopsis,short_story\nUn caf\u00e9,Fin\n".encode("latin-1"),
    "stories.txt": "A fox. It ran.\n",
    "shape.json": '{"hidden_size": 8}',
    "grid_base.yml": "base: {base_model: random:tiny}\n",
    "base_list.yml": "- base_model: random:tiny\n",
}

# name -> (the file, what its one line of refusal must match)
MALFORMED: dict[str, tuple[str | bytes, str]] = {
    # ---- the file itself
    "empty file": ("", r"holds empty; a grid file is a mapping"),
    "only comments": ("# nothing yet\n", r"holds empty"),
    "a list instead of a mapping": ("- base\n- vary\n", r"holds a list; a grid file is a mapping"),
    "a word instead of a mapping": ("techniques\n", r"holds 'techniques'; a grid file is a mapping"),
    "binary junk": (b"\x89PNG\r\n\x1a\n\x00\xff\xfe\x00", r"not UTF-8 text .*byte 0"),
    "control characters": (b"base: \x00\x01\n", r"not valid YAML: unacceptable character"),
    "a bracket that never closes": (BASE + "vary: {lora_r: [1, 2\n", r"not valid YAML at line \d+: "),
    "tab as indentation": ("base:\n\tbase_model: random:tiny\n", r"not valid YAML at line 2: .*cannot start any token"),
    "two documents": (BASE + "---\n" + BASE, r"not valid YAML"),
    "nested without end": ("base: " + "[" * 600, r"not valid YAML: nested too deeply"),
    "python object": ("base: !!python/object/apply:os.system ['touch pwned']\n", r"not valid YAML at line 1: .*python"),
    "python name": ("base: {base_model: !!python/name:os.system }\n", r"not valid YAML at line 1: .*python/name"),
    "number that is none": (BASE + "repeats: !!int ''\n", r"not valid YAML: no such number"),
    "date that is none": (BASE + "title: 2025-13-01\n", r"not valid YAML: no such number, date .*month"),
    "time that is none": (BASE + "title: !!timestamp today\n", r"not valid YAML: no such number, date"),
    "number in base sixty beyond a float": (BASE + f"title: {'59:' * 250}59.5\n", r"not valid YAML: no such number"),
    "flag that is none": (BASE + "title: !!bool maybe\n", r"not valid YAML: no such .*maybe"),
    "aliases of aliases": (_BOMB, r"aliases stand for more than 100000 values"),
    "merges of merges": (_MERGE_BOMB, r"aliases stand for more than 100000 values"),
    "list as a key": ("? [a, b]\n: 1\n", r"not valid YAML at line 1: a list is not a valid key"),
    "key given twice": (BASE + "repeats: 1\nrepeats: 2\n", r"line 3: key 'repeats' is given twice"),
    "key given twice in base": (_base("lora_r: 4, lora_r: 8"), r"line 1: key 'lora_r' is given twice"),
    # ---- keys
    "unknown key": ("bases: {base_model: random:tiny}\n", r"unknown key 'bases'; did you mean base\?"),
    "unknown key in base": (_base("lora_rank: 4"), r"base: unknown key 'lora_rank'; did you mean lora_\w+\?"),
    "unknown key with nothing near it": (_base("qqqqqq: 4"), r"base: unknown key 'qqqqqq'; `harness keys` lists"),
    "key that is a number": (_base("4: 4"), r"base: unknown key 4;"),
    "unknown factor": (
        BASE + "vary: {gradient_checkpoint: [true]}\n",
        r"unknown factor 'gradient_checkpoint'; did you mean gradient_checkpointing\?",
    ),
    "unknown key in a labelled level": (
        BASE + "vary: {technique: {QLoRA: {precison: nf4}}}\n",
        r"technique: QLoRA: unknown key 'precison'; did you mean precision\?",
    ),
    "unknown key in datasets": (
        _base("datasets: [{paht: storyteller}]"),
        r"datasets\.0: unknown key 'paht'; did you mean path\?",
    ),
    "unknown key in datasets type": (
        _data("storyteller", "field_instrution: synopsis"),
        r"datasets\.0\.type: unknown key 'field_instrution'; .*field_instruction\?",
    ),
    "spec key next to base": (
        BASE + "lora_r: 4\n",
        r"unknown key 'lora_r' \(did you mean to put lora_r under base:\?\)",
    ),
    "vary next to a training file's keys": (
        "base_model: random:tiny\nvary: {lora_r: [4]}\n",
        r"unknown key 'base_model' .*under base:",
    ),
    "no base": ("vary: {lora_r: [4]}\n", r"base is empty; it must be a mapping"),
    "base is a number": ("base: 3\n", r"base is 3; it must be a mapping .* or the path of a training file"),
    "base without base_model": ("base: {lora_r: 4}\n", r"base_model is missing; give one: .*smollm2-135m-instruct"),
    "base names a file that is not there": (
        "base: grid_bsae.yml\n",
        r"grid_bsae\.yml: no such file; did you mean grid_base\.yml\?",
    ),
    "base names a folder": ("base: .\n", r"is a folder; give a grid file"),
    "base names a file with a list": ("base: base_list.yml\n", r"base_list\.yml: holds a list"),
    "base names another grid": ("base: grid_base.yml\n", r"base: grid_base\.yml has base:, so it is a grid file"),
    "base name too long for a file": (f"base: {'x' * 5000}\n", r"cannot be read \(File name too long\)"),
    # ---- the grid's own keys
    "name leaves the results folder": ("name: ../x\n" + BASE, r"name is '\.\./x', not a folder name; use letters"),
    "name is the folder above": ("name: ..\n" + BASE, r"name is '\.\.', not a folder name"),
    "name is hidden": ("name: .git\n" + BASE, r"name is '\.git', not a folder name"),
    "name is a number": ("name: 5\n" + BASE, r"name is 5, not a folder name"),
    "title is a list": ("title: [a]\n" + BASE, r"title is a list; it must be text"),
    "unknown design": ("design: ablations\n" + BASE, r"unknown design 'ablations'; did you mean ablation\?"),
    "design that is a list": ("design: [grid]\n" + BASE, r"unknown design \['grid'\]; did you mean grid\?"),
    "repeats 0": ("repeats: 0\n" + BASE, r"repeats is 0; it must be a whole number of 1 or more"),
    "repeats true": ("repeats: true\n" + BASE, r"repeats is true; it must be a whole number"),
    "repeats as text": ("repeats: '3'\n" + BASE, r"repeats is '3'; it must be a whole number"),
    "vary is a list": (BASE + "vary: [lora_r]\n", r"vary is a list; it must be a mapping"),
    "empty levels": (BASE + "vary: {lora_r: []}\n", r"vary: lora_r has no levels; give at least one"),
    "no levels": (BASE + "vary: {lora_r: }\n", r"vary: lora_r has no levels; give at least one"),
    "empty labelled levels": (BASE + "vary: {technique: {}}\n", r"vary: technique has no levels"),
    "levels not a list": (BASE + "vary: {lora_r: 4}\n", r"vary: lora_r is 4; its levels must be a list like \[4\]"),
    "levels: not a list": (BASE + "vary: {lora_r: {levels: 4}}\n", r"vary: lora_r is 4; .* list like \[4\]"),
    "labelled level that is a number": (
        BASE + "vary: {lora_r: {small: 4}}\n",
        r"lora_r: small is 4; a labelled level is a mapping",
    ),
    "level of a wrong type": (BASE + "vary: {lora_r: [4, true]}\n", r"lora_r=true: lora_r is true; it must be a whole"),
    "level with an impossible value": (
        BASE + "vary: {technique: {none: {lora_r: -4}}}\n",
        r"none: lora_r is -4; it must be 1 or more",
    ),
    "label of two lines": (
        BASE + 'vary: {technique: {"one\\ntwo\\e[31m": {lora_r: 0}}}\n',
        r"one two \[31m: lora_r is 0",
    ),
    "level that switches a flag off": (
        BASE + "vary: {load_in_4bit: [true, false]}\n",
        r"load_in_4bit: false names no precision; say precision: bf16",
    ),
    "vary with design list": (BASE + "design: list\nvary: {lora_r: [4]}\n", r"design list takes trials:, not vary:"),
    "trials with design grid": (BASE + "design: grid\ntrials: [{lora_r: 4}]\n", r"design grid takes vary:"),
    "trials is a number": (BASE + "trials: 4\n", r"trials is 4; it must be a list of mappings"),
    "trial that is a word": (BASE + "trials: [lora_r]\n", r"trials: 'lora_r' is not a mapping of spec keys"),
    "hold that does not divide": (
        _base("micro_batch_size: 2, gradient_accumulation_steps: 2")
        + "vary: {micro_batch_size: {levels: [3], hold: effective_batch_size}}\n",
        r"micro_batch_size 3 does not divide the effective batch of 4",
    ),
    "hold with another key": (
        BASE + "vary: {lora_r: {levels: [4], hold: effective_batch_size}}\n",
        r"lora_r: hold: effective_batch_size goes with micro_batch_size",
    ),
    "hold of something else": (
        BASE + "vary: {micro_batch_size: {levels: [1], hold: tokens}}\n",
        r"hold is 'tokens'; use effective_batch_size",
    ),
    "hold without levels": (BASE + "vary: {micro_batch_size: {hold: effective_batch_size}}\n", r"has no levels"),
    "hold with labels": (
        BASE + "vary: {micro_batch_size: {levels: {big: {micro_batch_size: 4}}, hold: effective_batch_size}}\n",
        r"hold goes with a list of levels",
    ),
    "hold misspelt": (
        BASE + "vary: {micro_batch_size: {levels: [1], hodl: effective_batch_size}}\n",
        r"unknown key 'hodl'; did you mean hold\?",
    ),
    "hold and accumulation in one product": (
        BASE + "design: grid\nvary:\n  micro_batch_size: {levels: [1], hold: effective_batch_size}\n"
        "  gradient_accumulation_steps: [1, 2]\n",
        r"gradient_accumulation_steps=1: hold: effective_batch_size derives the accumulation",
    ),
    "too many trials": (_TOO_MANY, r"10000000000 trials; the limit is 500 \(raise it with --max-trials"),
    "too many repeats": (BASE + "repeats: 1000000000000\n", r"1000000000000 trials; the limit is 500"),
    "exclude matches nothing": (
        BASE + "vary: {lora_r: [4]}\nexclude: [{lora_r: 5}]\n",
        r"exclude: no trial has lora_r=5; drop the rule",
    ),
    "exclude drops everything": (
        BASE + "vary: {lora_r: [4]}\nexclude: [{base_model: random:tiny}]\n",
        r"exclude leaves no trial",
    ),
    "exclude is a mapping": (BASE + "exclude: {lora_r: 4}\n", r"exclude is a mapping; it must be a list"),
    "exclude of a wrong type": (
        _base("lora_r: 1") + "vary: {lora_r: [4]}\nexclude: [{lora_r: true}]\n",
        r"exclude: lora_r is true; it must be a whole number",
    ),
    "exclude with an unknown key": (BASE + "exclude: [{lora_rr: 4}]\n", r"exclude: unknown key 'lora_rr'; .*lora_r\?"),
    "exclude by a flag that is off": (
        BASE + "exclude: [{load_in_8bit: false}]\n",
        r"exclude: load_in_8bit: false names no precision",
    ),
    "claims is text": (BASE + "claims: all\n", r"claims is 'all'; it must be a list"),
    "claim without a metric": (
        BASE + "claims: [{id: a, says: b, compare: {}, expect: ratio < 1}]\n",
        r"claims: a: metric is missing; give one",
    ),
    "claim with an unknown metric": (
        BASE + "claims: [{id: a, says: b, compare: {}, metric: peak_memory, expect: ratio < 1}]\n",
        r"claims: a: metric: unknown metric 'peak_memory'; did you mean peak_\w*memory_bytes\?",
    ),
    "claim with a list of metrics": (
        BASE + "claims: [{id: a, says: b, compare: {}, metric: [eval_loss], expect: ratio < 1}]\n",
        r"claims: a: metric is a list; it must be text",
    ),
    # ---- values
    "true is no integer": (_base("lora_r: true"), r"base: lora_r is true; it must be a whole number"),
    "text is no integer": (_base('lora_r: "four"'), r"base: lora_r is 'four'; it must be a whole number"),
    "digits in quotes are no integer": (_base("lora_r: '4'"), r"base: lora_r is '4'; it must be a whole number"),
    "fraction is no integer": (_base("lora_r: 1.5"), r"base: lora_r is 1\.5; it must be a whole number"),
    "1.0 is no integer": (_base("lora_r: 1.0"), r"base: lora_r is 1\.0; it must be a whole number"),
    "null is no integer": (_base("lora_r: "), r"base: lora_r is empty; it must be a whole number"),
    "integer beyond any count": (_base(f"seed: 1{'0' * 30}"), r"seed is 10+; it must be 2147483647 or less"),
    "1 is no flag": (_base("gradient_checkpointing: 1"), r"gradient_checkpointing is 1; it must be true or false"),
    "text is no flag": (_base("gradient_checkpointing: 'yes'"), r"is 'yes'; it must be true or false"),
    "bf16 as a number": (_base("bf16: 1.0"), r"bf16: 1\.0 is neither true nor false, nor auto"),
    "micro_batch_size 0": (_base("micro_batch_size: 0"), r"micro_batch_size is 0; it must be 1 or more"),
    "max_steps 0": (_base("max_steps: 0"), r"max_steps is 0; it must be 1 or more"),
    "sequence_length too short": (_base("sequence_length: 4"), r"sequence_length is 4; it must be 8 or more"),
    "learning_rate nan": (_base("learning_rate: .nan"), r"learning_rate is nan; it must be a finite number"),
    "learning_rate infinite": (_base("learning_rate: .inf"), r"learning_rate is inf; it must be a finite number"),
    "learning_rate 0": (_base("learning_rate: 0"), r"learning_rate is 0\.0; it must be more than 0"),
    "learning_rate negative": (_base("learning_rate: -1e-4"), r"learning_rate is -0\.0001; it must be more than 0"),
    "learning_rate beyond a float": (_base(f"learning_rate: 1{'0' * 400}"), r"learning_rate is inf; .* finite number"),
    "learning_rate as a word": (_base("learning_rate: low"), r"learning_rate is 'low'; it must be a number"),
    "lora_dropout 1.0": (_base("lora_dropout: 1.0"), r"lora_dropout is 1\.0; it must be less than 1"),
    "val_set_size neither count nor fraction": (_base("val_set_size: 1.5"), r"val_set_size: 1\.5 is neither a count"),
    "val_set_size of all stories": (_base("val_set_size: 240"), r"val_set_size 240 leaves nothing to train on.*240"),
    "unknown optimizer": (
        _base("optimizer: adamw_bnb_8bits"),
        r"unknown optimizer 'adamw_bnb_8bits'; did you mean adamw_bnb_8bit\?",
    ),
    "unknown optimizer with nothing near it": (
        _base("optimizer: dion"),
        r"unknown optimizer 'dion'; use adamw_torch, .*sgd",
    ),
    "unknown precision": (_base("precision: bf61"), r"unknown precision 'bf61'; did you mean bf16\?"),
    "precision that is a list": (_base("precision: [int8], bf16: true"), r"contradictory precision .*int8.*bf16: true"),
    "unknown adapter": (_base("adapter: loras"), r"unknown adapter 'loras'; did you mean lora\?"),
    "unknown device": (_base("device: gpu"), r"unknown device 'gpu'; did you mean cpu\?"),
    "lora_target_modules as a number": (_base("lora_target_modules: 3"), r"3 is not a list of layer names"),
    "lora_target_modules as a glob": (
        _base('lora_target_modules: "*.q_proj"'),
        r"nor a regular expression \(nothing to",
    ),
    "a regular expression in a list of layers": (
        _base('lora_target_modules: [q_proj, ".*k_proj"]'),
        r"'\.\*k_proj' is no name of a layer; a regular expression stands alone",
    ),
    "all-linear in a list of layers": (
        _base("lora_target_modules: [q_proj, all-linear]"),
        r"all-linear stands first",
    ),
    "all-linear against lora_target_linear": (
        _base("lora_target_linear: false, lora_target_modules: all-linear"),
        r"lora_target_linear false contradicts lora_target_modules all-linear",
    ),
    "memory_budget nonsense": (_base("memory_budget: lots"), r"memory_budget: 'lots' is not a size; .*24GiB"),
    "memory_budget without unit": (_base("memory_budget: '24'"), r"memory_budget: '24' is not a size; .*24GiB"),
    "memory_budget 0": (_base("memory_budget: 0"), r"memory_budget: 0 is not a size .*24GiB"),
    "memory_budget beyond any machine": (_base(f"memory_budget: {'9' * 400}GiB"), r"is not a size .*24GiB"),
    # ---- combinations
    "contradictory flags": (_base("bf16: true, fp16: true"), r"contradictory precision \(bf16: true, fp16: true\)"),
    "contradictory loads": (_base("load_in_8bit: true, load_in_4bit: true"), r"contradictory precision .*load_in_8bit"),
    "flag against precision": (_base("precision: fp32, bf16: true"), r"contradictory precision \(precision: fp32, bf"),
    "flag off against precision": (_base("precision: bf16, bf16: false"), r"contradictory precision .*bf16: false"),
    "qlora in 8 bit": (_base("adapter: qlora, load_in_8bit: true"), r"contradictory precision .*adapter: qlora"),
    "two sequence lengths": (_base("sequence_len: 64, sequence_length: 128"), r"sequence_len 64 contradicts"),
    "int8 with full fine-tuning": (
        _base("precision: int8, adapter: none"),
        r"precision int8 with full fine-tuning: .*use adapter: lora, or precision: bf16",
    ),
    "nf4 with full fine-tuning": (_base("load_in_4bit: true, adapter: "), r"precision nf4 with full fine-tuning"),
    "nf4 as a level of full fine-tuning": (
        _base("adapter: none") + "vary: {precision: [bf16, nf4]}\n",
        r"precision=nf4: precision nf4 with full fine-tuning",
    ),
    "double quantisation of bf16": (_base("double_quantization: true"), r"double_quantization is for precision nf4"),
    "biases of quantised layers": (_base("precision: nf4, lora_bias: all"), r"lora_bias all with precision nf4: use"),
    "max_steps with num_epochs": (_base("max_steps: 3, num_epochs: 1"), r"max_steps and num_epochs exclude each other"),
    "two kinds of target": (
        _base("lora_target_linear: true, lora_target_modules: [q_proj]"),
        r"lora_target_linear and lora_target_modules exclude each other",
    ),
    "more processes than cores": (
        _base("num_processes: 9999, device: cpu"),
        r"num_processes 9999, and \d+ cores? here",
    ),
    "processes that do not divide": (
        BASE + "vary: {num_processes: {levels: [2], hold: effective_batch_size}}\n",
        r"num_processes=2: num_processes 2 does not divide the effective batch of 1",
    ),
    # ---- the prompt
    "format without instruction": (_data("storyteller", "format: 'Tell a story'"), r"never names \{instruction\}"),
    "format with braces for instruction": (_data("storyteller", "format: '{{instruction}}'"), r"never names \{instruc"),
    "format with an unknown placeholder": (
        _data("storyteller", "format: '{instruction} {plot}'"),
        r"placeholder other than \{instruction\}, \{input\}, \{system\}",
    ),
    "format with a number": (_data("storyteller", "format: '{instruction} {0}'"), r"placeholder other than"),
    "format that looks inside": (
        _data("storyteller", "format: '{instruction} {instruction.__class__}'"),
        r"placeholder other than",
    ),
    "format that pads without end": (
        _data("storyteller", "format: '{instruction:>9999999999}'"),
        r"placeholder other than",
    ),
    "format with a lone brace": (_data("storyteller", "format: '{instruction} }'"), r"brace that stands alone"),
    # ---- datasets
    "no datasets": (_base("datasets: []"), r"datasets is an empty list; it must have at least one entry"),
    "datasets as text": (_base("datasets: storyteller"), r"datasets is 'storyteller'; it must be a list"),
    "datasets as a list of text": (_base("datasets: [storyteller]"), r"datasets\.0 is 'storyteller'; it must be a map"),
    "type as text": (
        _base("datasets: [{path: storyteller, type: alpacca}]"),
        r"type 'alpacca' is unknown; use alpaca, chat_template, .*, or a mapping of prompt keys",
    ),
    "dataset without a path": (_base("datasets: [{type: {}}]"), r"datasets\.0\.path is missing; give one: .*jsonl"),
    "path of two lines": (_data('"a\\nb.jsonl"'), r"datasets\.0\.path: 'a\\nb\.jsonl' is not one line"),
    "missing dataset file": (_data("nowhere.jsonl"), r"dataset nowhere\.jsonl: no such file \(looked in /"),
    "dataset name too long for a file": (_data(f"{'x' * 300}.jsonl"), r"no such file"),
    "dataset name too long for a line": (_data(f"{'x' * 5000}.jsonl"), r"path is 'xxx.* must have at most 500"),
    "dataset of an unknown user's home": (_data("~nobody-of-that-name/a.jsonl"), r"~nobody-of-that-name.*no such file"),
    "unknown dataset": (_data("storytelle"), r"dataset 'storytelle' is unknown; did you mean storyteller\?"),
    "unknown dataset with nothing near it": (
        _data("squad"),
        r"'squad' is unknown; give storyteller, .*a file .*hub id",
    ),
    "hub id with half a name": (_data("owner/"), r"dataset 'owner/' is unknown; give storyteller"),
    "file of an unknown kind": (_data("./stories.txt"), r"stories\.txt' is unknown; .*\.jsonl"),
    "missing column": (_data("renamed.jsonl"), r"no column 'synopsis'; it has 'plot', 'tale' \(set field_instruction"),
    "missing input column": (_data("storyteller", "field_input: context"), r"no column 'context'; .*'short_story'"),
    "empty dataset": (_data("empty.jsonl"), r"empty\.jsonl has no rows; it needs at least one"),
    "dataset of blank lines": (_data("blank_lines.jsonl"), r"blank_lines\.jsonl has no rows"),
    "dataset of a header": (_data("header_only.csv"), r"header_only\.csv has no rows"),
    "broken JSONL": (_data("broken.jsonl"), r"broken\.jsonl cannot be read as \.jsonl: line 2, column 24: "),
    "a number where text belongs": (_data("number.jsonl"), r"number\.jsonl, row 2: 'synopsis' is 7; it must be text"),
    "null where text belongs": (_data("null.jsonl"), r"row 1: 'short_story' is None; it must be text"),
    "spaces where text belongs": (_data("spaces.csv"), r"row 1: 'short_story' is '  '; it must be text"),
    "half a character": (_data("surrogate.jsonl"), r"row 1: 'synopsis' is 'A \\ud800 fox\.'; it must be text"),
    "JSON of one row": (_data("not_rows.json"), r"cannot be read as \.json: it holds .*not a list of rows"),
    "JSON of texts": (_data("list_of_text.json"), r"row 1 is 'A fox\.', not an object with columns"),
    "JSON nested without end": (_data("deep.json"), r"deep\.json cannot be read as \.json: .*recursion"),
    "CSV with a comma too many": (_data("shifted.csv"), r"row 1 has more fields than the header; quote"),
    "CSV with a stray quote": (_data("quotes.csv"), r"quotes\.csv cannot be read as \.csv: .* expected after"),
    "CSV in another encoding": (_data("latin1.csv"), r"latin1\.csv cannot be read as \.csv: 'utf-8' codec"),
    "parquet that is none": (_data("junk.parquet"), r"junk\.parquet cannot be read as \.parquet: "),
    # ---- models
    "unknown base_model": (
        "base: {base_model: smollm2-135m}\n",
        r"base_model 'smollm2-135m' is neither .*; did you mean (random:)?smollm2-135m",
    ),
    "unknown base_model with nothing near it": ("base: {base_model: gpt}\n", r"'gpt' is neither .*hub id or random:"),
    "base_model with half a hub id": ("base: {base_model: owner/}\n", r"'owner/' is neither a folder nor a known name"),
    "base_model in a folder that is not there": ("base: {base_model: ./models/mine}\n", r"is neither a folder nor"),
    "base_model of an unknown user's home": ("base: {base_model: ~nobody-of-that-name}\n", r"is neither a folder nor"),
    "base_model name too long for a folder": (f"base: {{base_model: {'x' * 300}}}\n", r"is neither a folder nor"),
    "base_model empty": ("base: {base_model: ''}\n", r"base_model is ''; it must not be empty"),
    "base_model of two lines": ('base: {base_model: "random:ti\\nny"}\n', r"base_model: .* is not one line"),
    "base_model in a folder without a model": ("base: {base_model: .}\n", r"base_model \.: the folder has no config"),
    "unknown random architecture": (
        "base: {base_model: random:llama-3.1-8}\n",
        r"random:llama-3\.1-8: unknown architecture; did you mean llama-3\.1-8b\?",
    ),
    "random architecture of an incomplete file": (
        "base: {base_model: random:shape.json}\n",
        r"random:shape\.json: no model_type and vocab_size",
    ),
    "random architecture of a missing file": (
        "base: {base_model: random:nowhere.json}\n",
        r"random:nowhere\.json: No such file .*; give a config\.json",
    ),
}
