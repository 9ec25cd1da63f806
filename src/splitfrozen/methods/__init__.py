"""Methods: what is trained and how its loss comes about. The loop is `training.loop.fit`."""
