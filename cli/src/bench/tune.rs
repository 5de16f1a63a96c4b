//! Looks for the shape in which the bare ring is fastest on this machine: a limit is only one at its best.

use anyhow::Result;
use clap::ValueEnum;

use super::copy::CopyKernel;
use super::plan::RingShape;

/// Where the search starts.
pub const START: RingShape = RingShape { bytes: 1 << 20, step: 64 << 10, copy: CopyKernel::Libc };

/// Tries sizes, then ways to copy, then steps, each with the best of those before. `measure` gives bytes per second.
pub fn best_ring(mut measure: impl FnMut(RingShape) -> Result<f64>) -> Result<RingShape> {
    let mut best = (START, measure(START)?);
    let sizes = (17..=24).map(|n| 1 << n);
    let mut consider = |best: &mut (RingShape, f64), shape: RingShape| -> Result<()> {
        if shape != best.0 {
            let speed = measure(shape)?;
            if speed > best.1 {
                *best = (shape, speed);
            }
        }
        Ok(())
    };
    for copy in CopyKernel::value_variants() {
        let shape = RingShape { copy: *copy, ..best.0 };
        consider(&mut best, shape)?;
    }
    for bytes in sizes {
        let shape = RingShape { bytes, ..best.0 };
        consider(&mut best, shape)?;
    }
    for step in [8 << 10, 16 << 10, 32 << 10] {
        let shape = RingShape { step, ..best.0 };
        consider(&mut best, shape)?;
    }
    for copy in CopyKernel::value_variants() {
        let shape = RingShape { copy: *copy, ..best.0 };
        consider(&mut best, shape)?;
    }
    Ok(best.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_shape_is_found_where_the_choices_are_independent() {
        let want = RingShape { bytes: 4 << 20, step: 16 << 10, copy: CopyKernel::Vector };
        let best = best_ring(|shape| {
            let near = |a: usize, b: usize| -(a.ilog2().abs_diff(b.ilog2()) as f64);
            let copy = if shape.copy == want.copy { 0.0 } else { -1.0 };
            Ok(near(shape.bytes, want.bytes) + near(shape.step, want.step) + copy)
        });
        assert_eq!(best.unwrap(), want);
    }
}
