//! What the pictures have in common: who has which colour, how figures are written, and scales.

use anyhow::{Result, anyhow};
use plotters::backend::SVGBackend;
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, IntoDrawingArea};
use plotters::element::{PathElement, Rectangle, Text};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, FontStyle, IntoFont, RGBColor, ShapeStyle, TextStyle};

use crate::bench::plan::Transport;

/// Text.
pub const INK: RGBColor = RGBColor(0x22, 0x26, 0x2b);
/// Text that matters less.
pub const FAINT: RGBColor = RGBColor(0x6b, 0x72, 0x7b);
/// Lines behind the data.
pub const GRID: RGBColor = RGBColor(0xe6, 0xe8, 0xeb);

/// A transport's colour: strong for ours, dark for limits, soft for the others.
pub fn colour(transport: Transport) -> RGBColor {
    match transport {
        Transport::DmbridgeMap => RGBColor(0x12, 0x5d, 0xc4),
        Transport::DmbridgeInplace => RGBColor(0x00, 0x8f, 0x7a),
        Transport::DmbridgeMessage => RGBColor(0x2f, 0x7f, 0xe0),
        Transport::DmbridgeDirect => RGBColor(0x00, 0x6b, 0x8f),
        Transport::EngineCpu => RGBColor(0xa0, 0x72, 0xd0),
        Transport::EngineCpuNode => RGBColor(0x55, 0x2a, 0x88),
        Transport::DmbridgeMove => RGBColor(0x7b, 0x3f, 0xb5),
        Transport::DmbridgeRun => RGBColor(0x1f, 0x6f, 0xc4),
        Transport::DmbridgeSmc => RGBColor(0x1b, 0x9c, 0xd8),
        Transport::Tcp => RGBColor(0xd9, 0x7c, 0x3a),
        Transport::Uds => RGBColor(0xc2, 0xa0, 0x3c),
        Transport::Pipe => RGBColor(0xb5, 0x8a, 0x7a),
        Transport::Iceoryx2 => RGBColor(0x6f, 0xa0, 0x54),
        Transport::Ucx => RGBColor(0xc7, 0x5b, 0x8e),
        Transport::Chardev => RGBColor(0x3d, 0x6b, 0x1f),
        Transport::AfSmc => RGBColor(0x2b, 0x7f, 0xd6),
        Transport::Vsock => RGBColor(0x5f, 0x9e, 0xa8),
        Transport::Memcpy | Transport::Ring | Transport::Cacheline => RGBColor(0x8d, 0x95, 0x9e),
    }
}

/// An SVG picture in the making, in pixels.
pub struct Picture<'a>(DrawingArea<SVGBackend<'a>, Shift>);

/// Where a text's position is in it.
#[derive(Clone, Copy)]
pub enum Anchor {
    /// At its left end.
    Left,
    /// In its middle.
    Middle,
    /// At its right end.
    Right,
}

impl Picture<'_> {
    /// Draws into a new picture, and returns it as SVG.
    pub fn draw(width: i32, height: i32, with: impl FnOnce(&Picture<'_>) -> Result<()>) -> Result<String> {
        let mut svg = String::new();
        let size = (width.unsigned_abs(), height.unsigned_abs());
        {
            let picture = Picture(SVGBackend::with_string(&mut svg, size).into_drawing_area());
            with(&picture)?;
            picture.0.present().map_err(plain)?;
        }
        Ok(svg)
    }

    /// A filled or, with a border only, empty rectangle.
    pub fn rectangle(&self, from: (i32, i32), to: (i32, i32), style: ShapeStyle) -> Result<()> {
        self.0.draw(&Rectangle::new([from, to], style)).map_err(plain)
    }

    /// A line through points.
    pub fn path(&self, points: Vec<(i32, i32)>, colour: RGBColor, width: u32) -> Result<()> {
        self.0.draw(&PathElement::new(points, colour.stroke_width(width))).map_err(plain)
    }

    /// A line from one point to the next, interrupted.
    pub fn dashes(&self, points: &[(i32, i32)], colour: RGBColor, width: u32) -> Result<()> {
        const DASH: f64 = 7.0;
        // Dashes go on over corners: `at` is where in the pattern of dash and gap a segment starts.
        let mut at = 0.0;
        for pair in points.windows(2) {
            let (from, to) = (pair[0], pair[1]);
            let (dx, dy) = (f64::from(to.0 - from.0), f64::from(to.1 - from.1));
            let length = dx.hypot(dy);
            let point = |s: f64| {
                let part = if length > 0.0 { s / length } else { 0.0 };
                (from.0 + (dx * part).round() as i32, from.1 + (dy * part).round() as i32)
            };
            let mut s = 0.0;
            while s < length {
                let phase: f64 = (at + s) % (2.0 * DASH);
                let (drawn, rest) =
                    if phase < DASH { (true, DASH - phase) } else { (false, 2.0 * DASH - phase) };
                let end = (s + rest.max(0.5)).min(length);
                if drawn {
                    self.path(vec![point(s), point(end)], colour, width)?;
                }
                s = end;
            }
            at += length;
        }
        Ok(())
    }

    /// A line of text.
    pub fn text(
        &self,
        text: &str,
        at: (i32, i32),
        anchor: Anchor,
        size: i32,
        colour: RGBColor,
        bold: bool,
    ) -> Result<()> {
        let h = match anchor {
            Anchor::Left => HPos::Left,
            Anchor::Middle => HPos::Center,
            Anchor::Right => HPos::Right,
        };
        // The back-end divides the size by 1.24.
        let mut font = ("sans-serif", f64::from(size) * 1.24).into_font();
        if bold {
            font = font.style(FontStyle::Bold);
        }
        let style = TextStyle::from(font).color(&colour).pos(Pos::new(h, VPos::Center));
        self.0.draw(&Text::new(text.to_owned(), at, style)).map_err(plain)
    }
}

fn plain<E: std::error::Error + Send + Sync>(
    error: plotters::drawing::DrawingAreaErrorKind<E>,
) -> anyhow::Error {
    anyhow!("a picture could not be drawn: {error}")
}

/// A logarithmic scale from values to pixels.
#[derive(Clone, Copy)]
pub struct LogScale {
    from: f64,
    to: f64,
    pixels: (i32, i32),
}

impl LogScale {
    /// From `from`, at the first pixel, to `to`, at the second. Both are positive.
    pub fn new(from: f64, to: f64, pixels: (i32, i32)) -> LogScale {
        LogScale { from: from.ln(), to: to.ln().max(from.ln() + 1e-9), pixels }
    }

    /// The pixel of a positive value.
    pub fn at(&self, value: f64) -> i32 {
        let part = (value.ln() - self.from) / (self.to - self.from);
        self.pixels.0 + (f64::from(self.pixels.1 - self.pixels.0) * part).round() as i32
    }
}

/// Moves labels apart so that each has `gap` pixels, with as little change as the order allows.
pub fn spread(mut wanted: Vec<(i32, usize)>, gap: i32, range: (i32, i32)) -> Vec<(i32, usize)> {
    wanted.sort();
    let mut next = range.0;
    for (at, _) in &mut wanted {
        *at = (*at).max(next);
        next = *at + gap;
    }
    let mut last = range.1;
    for (at, _) in wanted.iter_mut().rev() {
        *at = (*at).min(last);
        last = *at - gap;
    }
    wanted
}

/// A number of bytes.
pub fn size(bytes: f64) -> String {
    match bytes {
        b if b >= 1048576.0 => format!("{:.0} MiB", b / 1048576.0),
        b if b >= 1024.0 => format!("{:.0} KiB", b / 1024.0),
        b => format!("{b:.0} B"),
    }
}

/// A number of nanoseconds.
pub fn time(nanoseconds: f64) -> String {
    let digits = |value: f64, unit: &str| {
        let decimals = if value >= 100.0 || value.fract() == 0.0 { 0 } else { 1 + usize::from(value < 10.0) };
        format!("{value:.decimals$} {unit}")
    };
    match nanoseconds {
        ns if ns >= 1e6 => digits(ns / 1e6, "ms"),
        ns if ns >= 1e3 => digits(ns / 1e3, "µs"),
        ns if ns >= 100.0 => format!("{ns:.0} ns"),
        ns => digits(ns, "ns"),
    }
}

/// A figure with its unit, for people.
pub fn figure(value: f64, unit: &str) -> String {
    match unit {
        "ns" => time(value),
        "1/s" if value >= 1e6 => format!("{} M/s", super::super::table::figure(value / 1e6)),
        "1/s" if value >= 1e3 => format!("{} k/s", super::super::table::figure(value / 1e3)),
        "1/s" => format!("{}/s", super::super::table::figure(value)),
        "GB/s" if value < 0.1 => format!("{} MB/s", super::super::table::figure(value * 1e3)),
        unit => format!("{} {unit}", super::super::table::figure(value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_keep_their_order_and_their_distance() {
        let labels = spread(vec![(100, 0), (102, 1), (10, 2), (398, 3), (399, 4)], 15, (0, 400));
        assert_eq!(labels, [(10, 2), (100, 0), (115, 1), (385, 3), (400, 4)]);
    }

    #[test]
    fn figures_are_written_for_people() {
        assert_eq!(
            [time(94.0), time(187.4), time(8812.0), time(1.5e6)],
            ["94 ns", "187 ns", "8.81 µs", "1.50 ms"]
        );
        assert_eq!([size(1.0), size(4096.0), size(16777216.0)], ["1 B", "4 KiB", "16 MiB"]);
        assert_eq!(figure(2_345_678.0, "1/s"), "2.35 M/s");
        assert_eq!([figure(12.34, "GB/s"), figure(0.01, "GB/s")], ["12.3 GB/s", "10.0 MB/s"]);
    }

    #[test]
    fn a_logarithmic_scale_has_equal_steps_for_equal_factors() {
        let scale = LogScale::new(1.0, 10000.0, (0, 400));
        assert_eq!([1.0, 10.0, 100.0, 10000.0].map(|v| scale.at(v)), [0, 100, 200, 400]);
    }
}
