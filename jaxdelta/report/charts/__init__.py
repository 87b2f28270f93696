"""Charts as data, and how they are drawn with Plotly and Matplotlib."""
