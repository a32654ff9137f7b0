"""Data sources, one file each; `effjax.data.SOURCES` names them and states their contract.

To add a text source, derive from `effjax.data.documents.DocumentSource` (or from
`files.FileSource` for local files) and implement `_read`; for images, derive from
`effjax.data.images.ImageSource`. Then name the class in `SOURCES`.
"""
