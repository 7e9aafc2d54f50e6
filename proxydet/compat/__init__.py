"""The only place that knows about the versions of detectron2 and other libraries."""
