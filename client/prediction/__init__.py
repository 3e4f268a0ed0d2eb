"""A trained model on a hospital's new studies; what it says stays where the studies are."""
