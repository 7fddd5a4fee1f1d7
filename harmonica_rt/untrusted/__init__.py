"""What comes from outside, as data: files are read strictly, and what they say is escaped before it is shown.

`strict_json` reads JSON, `text` makes text safe to print. Both import nothing of this project, so that everything may
import them; each format turns their errors into its own, with the name of the file.
"""
