"""The store: manifest, layout, files, journal."""
