"""How close the methods are to the posterior. These cases time nothing and run only where they are named."""
