"""Tables, whatever they come from: files, zips, queries, listings. Rows, columns, and the images they name."""
