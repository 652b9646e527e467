"""The report on a store: one page of figures, images and charts."""
