"""Jobs on Ray: prepare data, train, evaluate. The only place that knows Ray Data and Ray Train."""
