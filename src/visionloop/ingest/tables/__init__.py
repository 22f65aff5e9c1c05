"""Tables from files, zips, queries and listings: rows, columns, and the images they name."""
