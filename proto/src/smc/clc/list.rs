//! A list of bounded length, without an allocator: messages hold at most eight of anything, and are short.

use core::fmt;

/// At most `N` values.
#[derive(Clone, Copy)]
pub struct List<T, const N: usize> {
    items: [T; N],
    len: usize,
}

/// There is no room for another one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the list is full")]
pub struct Full;

impl<T: Copy + Default, const N: usize> List<T, N> {
    /// An empty list.
    pub fn new() -> List<T, N> {
        List { items: [T::default(); N], len: 0 }
    }

    /// Adds one value.
    ///
    /// # Errors
    ///
    /// [`Full`] if there are `N` already.
    pub fn push(&mut self, item: T) -> Result<(), Full> {
        *self.items.get_mut(self.len).ok_or(Full)? = item;
        self.len += 1;
        Ok(())
    }

    /// Adds several values, or none.
    ///
    /// # Errors
    ///
    /// [`Full`] if there would be more than `N`.
    pub fn extend_from_slice(&mut self, items: &[T]) -> Result<(), Full> {
        let end = self.len.checked_add(items.len()).filter(|end| *end <= N).ok_or(Full)?;
        self.items[self.len..end].copy_from_slice(items);
        self.len = end;
        Ok(())
    }

    /// The first `N` values of a sequence.
    pub fn first_of(items: impl IntoIterator<Item = T>) -> List<T, N> {
        let mut list = List::new();
        for item in items.into_iter().take(N) {
            list.items[list.len] = item;
            list.len += 1;
        }
        list
    }
}

impl<T: Copy + Default, const N: usize> Default for List<T, N> {
    fn default() -> List<T, N> {
        List::new()
    }
}

impl<T, const N: usize> core::ops::Deref for List<T, N> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.items[..self.len]
    }
}

impl<T, const N: usize> core::ops::DerefMut for List<T, N> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.items[..self.len]
    }
}

impl<T: PartialEq, const N: usize> PartialEq for List<T, N> {
    fn eq(&self, other: &List<T, N>) -> bool {
        **self == **other
    }
}

impl<T: Eq, const N: usize> Eq for List<T, N> {}

impl<T: fmt::Debug, const N: usize> fmt::Debug for List<T, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_its_capacity_goes_in() {
        let mut list = List::<u8, 3>::new();
        list.extend_from_slice(&[1, 2]).unwrap();
        assert_eq!(list.extend_from_slice(&[3, 4]), Err(Full));
        list.push(3).unwrap();
        assert_eq!(list.push(4), Err(Full));
        assert_eq!(*list, [1, 2, 3]);
        assert_eq!(List::<u8, 2>::first_of(0..9), List::first_of([0, 1]));
    }
}
