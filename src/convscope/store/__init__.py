"""The store of a scan: Parquet tables, arrays and thumbnails in one folder, and the classes that read them."""
