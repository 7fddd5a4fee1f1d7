"""Files that somebody damaged or forged, given to every reader of this project: each must be read or refused in words.

`python -m benchmarks fuzz --seconds 600` runs for a while, `tests/benchmarks/test_fuzz.py` a fixed few of its files.
One module per format says how valid files are made, how they are damaged with their structure in mind, how they are
read through the public door, and which errors that door documents. `run.py` counts what happens; whatever is neither a
result nor a documented error that names the file, in printable words, is a finding. To add a format, write such a
module and name it in `formats.py`.
"""
