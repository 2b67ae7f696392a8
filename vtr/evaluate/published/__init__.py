"""Published tables as data, one file a table; :mod:`vtr.evaluate.compare` reads them."""
