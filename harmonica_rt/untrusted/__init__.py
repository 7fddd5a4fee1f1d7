"""Untrusted: reads files strictly, as data, and escapes text from them before it is shown.

In: bytes and names from files that anyone may have written. Out: plain values, fp32 vectors and printable text, or an
error; each file format turns these errors into its own, with the name of the file.

Hazard: a pickle can run code, a small file can claim a huge tensor, JSON readers accept what nobody meant, and a
terminal obeys escape sequences. No module here runs code from a file, or allocates more than the file holds.

Reading order: `text` (makes text printable), `strict_json` (JSON), `pickle_data` (pickles), `torch_archive` (files of
torch.save). Within this project they import only each other, so that every module may import them.
"""
