"""Statistics, pictures and tables of finished runs; reads only the files that they wrote."""
