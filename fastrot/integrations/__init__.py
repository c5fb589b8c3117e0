"""Where fastrot meets other libraries' extension points."""
