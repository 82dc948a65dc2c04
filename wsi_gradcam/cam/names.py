"""Names of the methods, kept apart so that a client can check them without loading torch."""

METHOD_NAMES = ("gradcam", "hirescam")
