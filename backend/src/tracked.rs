//! A map that remembers which of its entries may have changed, for whoever writes them down.

use std::collections::HashSet;
use std::collections::hash_map::{HashMap, IterMut, RandomState};
use std::hash::Hash;
use std::ops::Deref;

/// A map to read as any other. Changes are remembered once [`track`](Self::track) was called.
#[derive(Debug)]
pub struct Tracked<K, V> {
    map: HashMap<K, V, RandomState>,
    changed: Option<HashSet<K>>,
}

impl<K, V> Default for Tracked<K, V> {
    fn default() -> Tracked<K, V> {
        Tracked { map: HashMap::new(), changed: None }
    }
}

impl<K: Eq + Hash + Clone, V> Tracked<K, V> {
    /// From now on changes are remembered.
    pub fn track(&mut self) {
        self.changed.get_or_insert_default();
    }

    fn note(&mut self, key: &K) {
        if let Some(changed) = &mut self.changed {
            changed.insert(key.clone());
        }
    }

    /// The keys of what was added, removed, or handed out to be changed since the last time.
    pub fn take_changed(&mut self) -> HashSet<K> {
        self.changed.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Adds or replaces.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.note(&key);
        self.map.insert(key, value)
    }

    /// Removes.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        let removed = self.map.remove(key);
        if removed.is_some() {
            self.note(key);
        }
        removed
    }

    /// To be changed.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        if self.changed.is_some() && self.map.contains_key(key) {
            self.note(key);
        }
        self.map.get_mut(key)
    }

    /// Keeps what `keep` says.
    pub fn retain(&mut self, mut keep: impl FnMut(&K, &mut V) -> bool) {
        let changed = &mut self.changed;
        self.map.retain(|key, value| {
            let keeps = keep(key, value);
            if let Some(changed) = changed.as_mut().filter(|_| !keeps) {
                changed.insert(key.clone());
            }
            keeps
        });
    }

    /// To be changed in what is not written down.
    pub fn get_mut_untracked(&mut self, key: &K) -> Option<&mut V> {
        self.map.get_mut(key)
    }

    /// All, to be changed in what is not written down.
    pub fn iter_mut_untracked(&mut self) -> IterMut<'_, K, V> {
        self.map.iter_mut()
    }
}

impl<K, V> Deref for Tracked<K, V> {
    type Target = HashMap<K, V, RandomState>;

    fn deref(&self) -> &HashMap<K, V, RandomState> {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_have_changed_is_told_once() {
        let mut map = Tracked::default();
        map.insert(1, 'a');
        assert!(map.take_changed().is_empty());
        map.track();
        map.insert(2, 'b');
        map.insert(3, 'c');
        map.remove(&2);
        assert!(map.get_mut(&1).is_some() && map.get_mut(&9).is_none() && map.get(&3).is_some());
        assert_eq!(map.take_changed(), HashSet::from([1, 2, 3]));
        map.retain(|key, _| *key != 3);
        assert_eq!(map.take_changed(), HashSet::from([3]));
        assert!(map.take_changed().is_empty());
    }
}
