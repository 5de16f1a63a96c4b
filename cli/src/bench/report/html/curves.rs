//! Figures over a range, as lines that carry their own names.

use anyhow::Result;

use super::draw::{Anchor, FAINT, GRID, LogScale, Picture, colour, spread};
use crate::bench::plan::Transport;

const WIDTH: i32 = 1140;
const HEIGHT: i32 = 470;
/// The area of the data: left, top, right, bottom.
const PLOT: (i32, i32, i32, i32) = (78, 16, 985, 424);

/// A mark on an axis.
pub struct Tick {
    /// Where.
    pub at: f64,
    /// What is written there.
    pub label: String,
}

/// A line of the picture.
pub struct Curve {
    /// Whose.
    pub transport: Transport,
    /// Its points, from left to right.
    pub points: Vec<(f64, f64)>,
}

/// A picture with two logarithmic axes.
pub struct Chart {
    /// Marks from left to right; the first and the last are the ends of the axis.
    pub x: Vec<Tick>,
    /// What the x axis is.
    pub x_title: &'static str,
    /// How a value is written at the y axis.
    pub y_label: fn(f64) -> String,
    /// The lines.
    pub curves: Vec<Curve>,
}

impl Chart {
    /// The picture.
    pub fn svg(&self) -> Result<String> {
        let values = || self.curves.iter().flat_map(|c| &c.points).map(|p| p.1).filter(|v| *v > 0.0);
        let decade = |value: f64, round: fn(f64) -> f64| 10f64.powf(round(value.log10()));
        let low = decade(values().fold(f64::INFINITY, f64::min).min(1e12), f64::floor);
        let high = decade(values().fold(low, f64::max), f64::ceil).max(low * 10.0);
        let (first, last) = (self.x.first().map_or(1.0, |t| t.at), self.x.last().map_or(10.0, |t| t.at));
        let x = LogScale::new(first, last, (PLOT.0, PLOT.2));
        let y = LogScale::new(low, high, (PLOT.3, PLOT.1));

        Picture::draw(WIDTH, HEIGHT, |picture| {
            for tick in &self.x {
                let at = x.at(tick.at);
                picture.path(vec![(at, PLOT.1), (at, PLOT.3)], GRID, 1)?;
                picture.text(&tick.label, (at, PLOT.3 + 16), Anchor::Middle, 12, FAINT, false)?;
            }
            let mut value = low;
            while value <= high * 1.001 {
                let at = y.at(value);
                picture.path(vec![(PLOT.0, at), (PLOT.2, at)], GRID, 1)?;
                picture.text(&(self.y_label)(value), (PLOT.0 - 10, at), Anchor::Right, 12, FAINT, false)?;
                value *= 10.0;
            }
            let middle = ((PLOT.0 + PLOT.2) / 2, PLOT.3 + 38);
            picture.text(self.x_title, middle, Anchor::Middle, 13, FAINT, false)?;

            // Ours last, on top of the others.
            let mut order: Vec<&Curve> = self.curves.iter().filter(|c| !c.points.is_empty()).collect();
            order.sort_by_key(|c| c.transport.is_ours());
            let mut ends = Vec::new();
            for (index, curve) in order.iter().enumerate() {
                let points: Vec<_> =
                    curve.points.iter().filter(|p| p.1 > 0.0).map(|(a, b)| (x.at(*a), y.at(*b))).collect();
                let width = if curve.transport.is_ours() { 3 } else { 2 };
                if curve.transport.is_limit() {
                    picture.dashes(&points, colour(curve.transport), width)?;
                } else {
                    picture.path(points.clone(), colour(curve.transport), width)?;
                }
                ends.extend(points.last().map(|end| (end.1, index)));
            }
            let wanted = ends.clone();
            for (at, index) in spread(ends, 17, (PLOT.1, PLOT.3)) {
                let transport = order[index].transport;
                let end = wanted.iter().find(|(_, i)| *i == index).map_or(at, |(end, _)| *end);
                picture.path(vec![(PLOT.2 + 2, end), (PLOT.2 + 12, at)], colour(transport), 1)?;
                let name = transport.name() + if transport.is_limit() { " (limit)" } else { "" };
                let bold = transport.is_ours();
                picture.text(&name, (PLOT.2 + 16, at), Anchor::Left, 13, colour(transport), bold)?;
            }
            Ok(())
        })
    }
}
