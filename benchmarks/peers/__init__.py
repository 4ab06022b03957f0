"""What runs in the measured processes: rowmill's pipelines, the other libraries' applications, and bare loops."""
