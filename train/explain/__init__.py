"""`explain`: what a trained network does inside with an image, as a page with maps, and as PNG files.

`explain.explain` is the command; `quantities` names what `model.inside` measures, `sheets` draws it, `page` writes it.
"""
