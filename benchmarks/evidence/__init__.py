"""The pieces of the GLUE benchmark, the results that are kept of them, and the page that shows these."""
