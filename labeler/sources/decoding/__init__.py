"""From the bytes of image files to the teacher's square input."""
