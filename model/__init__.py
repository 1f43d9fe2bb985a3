"""The network, its checkpoint files, and the export to the artifact that `app` serves. Imports neither of the others."""
