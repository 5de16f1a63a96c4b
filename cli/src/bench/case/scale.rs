//! One daemon with more and more devices.
