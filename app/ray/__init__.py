"""The engine on a Ray cluster: `serve_app` answers HTTP, `classify_dataset` classifies data sets. Needs the [ray] extra.

Part of the package, not of a folder beside it, because every node of a cluster imports it: from a clone and from an
install the name is the same (`serve run app.ray.serve_app:app`), and nothing has to be shipped to the nodes by Ray.
"""
