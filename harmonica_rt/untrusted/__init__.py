"""What comes from outside, as data: files are read strictly, and what they say is escaped before it is shown.

`strict_json` reads JSON, `pickle_data` pickles, `torch_archive` what torch.save wrote, and none of them runs anything;
`text` makes text safe to print. They import nothing of this project but each other, so that everything may import them;
each format turns their errors into its own, with the name of the file.
"""
