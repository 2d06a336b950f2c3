"""Images in, images out: degradations, compositing, files of the user, contact sheets."""
