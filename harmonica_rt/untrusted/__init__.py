"""Untrusted input as data: files are read strictly, and text from them is escaped before it is shown.

`strict_json` reads JSON, `pickle_data` reads pickles, `torch_archive` reads files of torch.save, and none of them runs
code; `text` makes text safe to print. Within this project they import only each other, so that every module may import
them; each file format turns their errors into its own, with the name of the file.
"""
