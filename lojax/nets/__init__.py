"""One file per kind of net that lojax can wrap."""
