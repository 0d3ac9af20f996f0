"""Where bytes come from: a directory, S3 or a Hub; and the closed process for pickled ones."""
