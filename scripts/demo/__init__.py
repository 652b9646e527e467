"""The demo: drawn scenes, a small teacher, its labels, three students, and a page that compares them."""
