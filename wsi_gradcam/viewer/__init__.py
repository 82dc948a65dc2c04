"""`wsi-gradcam view`: a server of results and slides, and the page (in `page/`) that shows them in a browser."""
