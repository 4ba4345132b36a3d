"""Measures of motion and of what is seen; one file per kind. None of these needs weights from elsewhere."""
