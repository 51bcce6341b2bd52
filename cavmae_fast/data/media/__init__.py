"""Files to arrays and back: media files, encoded images and sounds, generated clips. Nothing here imports torch."""
