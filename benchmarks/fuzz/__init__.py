"""Gives damaged and forged files to every reader of this project, which must read or refuse each of them.

`python -m benchmarks fuzz --seconds 600` runs for ten minutes; `tests/benchmarks/test_fuzz.py` runs a few fixed files.

In: a seed. Out: rows that count files and findings, and each finding's file. A finding is any outcome other than a
result that is fit for use or a documented error that names the file and prints no control characters.

Hazard: a reader's first check refuses most random damage, and what lies behind it stays untested. So damage follows the
structure of a format, and every eighth file is valid and must be read.

Reading order: `format` (what the fuzzer knows about a format), `json_damage` and `safetensors_damage` (damage that
knows the structure of a file), one module per format (valid files, damage, public reader, documented errors):
`schedules`, `routers`, `smoothcache`, `cache_dit`, `invardiff`, `recipes`, `checkpoints`, `conditions`, `plan_file`;
`formats` (all of them), `run`. To add a format, write such a module and name it in `formats`.
"""
