"""Moving bodies: rotations, skeletons, clips, features and files. Importing it loads nothing."""
