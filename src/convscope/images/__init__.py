"""Read images safely, make network input of them, and lay maps back over the originals."""
