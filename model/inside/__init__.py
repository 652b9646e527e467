"""Looking inside a network: what its mixers compute on one image, as numbers and maps; nothing is drawn here.

`look_inside` gives an `Inside`, the measures of every layer.
"""
