"""LIBERO's four suites: scene, scripted expert, demonstrations and training samples."""
