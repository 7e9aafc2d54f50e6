"""Every step between the files that are downloaded and the files that training and evaluation read."""
