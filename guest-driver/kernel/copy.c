// SPDX-License-Identifier: GPL-2.0
/*
 * Stores into the window. memcpy() promises nothing about how a word is written,
 * and the other side looks while we write: here an aligned word of eight bytes
 * is always one store.
 */
#include <linux/ktime.h>
#include <linux/log2.h>
#include <linux/slab.h>
#include <linux/version.h>
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
#include <linux/unaligned.h>
#else
#include <asm/unaligned.h>
#endif
#include "dmbridge.h"

/* Below, plain stores are best whatever the plan says. */
#define SMALL	256

static void copy_words(u64 *to, const u8 *from, size_t words)
{
	while (words >= 4) {
		u64 a = get_unaligned((const u64 *)from), b = get_unaligned((const u64 *)(from + 8));
		u64 c = get_unaligned((const u64 *)(from + 16)), d = get_unaligned((const u64 *)(from + 24));

		WRITE_ONCE(to[0], a);
		WRITE_ONCE(to[1], b);
		WRITE_ONCE(to[2], c);
		WRITE_ONCE(to[3], d);
		to += 4;
		from += 32;
		words -= 4;
	}
	while (words--) {
		WRITE_ONCE(*to, get_unaligned((const u64 *)from));
		to++;
		from += 8;
	}
}

#ifdef CONFIG_X86_64
/* Whether the string instruction is as good as plain stores here. */
static bool strings_are_fast;

static void copy_string(u64 *to, const u8 *from, size_t words)
{
	asm volatile("rep movsq" : "+D" (to), "+S" (from), "+c" (words) : : "memory");
}

static void copy_nontemporal(u64 *to, const u8 *from, size_t words)
{
	for (; words; words--, to++, from += 8)
		asm volatile("movnti %1, %0" : "=m" (*to) : "r" (get_unaligned((const u64 *)from)));
	/* Such stores are ordered by nothing else. */
	wmb();
}

/*
 * An emulated CPU does the string instruction word by word, slowly. The device
 * cannot know that, so it is tried.
 */
void dmbridge_copy_calibrate(void)
{
	u64 best[2] = { U64_MAX, U64_MAX }, start;
	u8 *memory = kzalloc(2 * SZ_16K, GFP_KERNEL);
	int round;

	if (!memory)
		return;
	for (round = 0; round < 8; round++) {
		start = ktime_get_ns();
		copy_words((u64 *)memory, memory + SZ_16K, SZ_16K / 8);
		best[0] = min(best[0], ktime_get_ns() - start);
		start = ktime_get_ns();
		copy_string((u64 *)memory, memory + SZ_16K, SZ_16K / 8);
		best[1] = min(best[1], ktime_get_ns() - start);
	}
	strings_are_fast = best[1] <= best[0];
	pr_debug("16 KiB by words: %llu ns, by strings: %llu ns\n", best[0], best[1]);
	kfree(memory);
}

static void copy_bulk(struct dmbridge *dev, u64 *to, const u8 *from, size_t words)
{
	unsigned int i = min(ilog2(words * 8 / SMALL), DMBRIDGE_COPY_PLAN - 1);

	switch (dev->limits.copy_plan[i]) {
	case DMBRIDGE_COPY_NONTEMPORAL:
		/* Without string instructions there are no caches to care for either. */
		if (strings_are_fast) {
			copy_nontemporal(to, from, words);
			return;
		}
		break;
	case DMBRIDGE_COPY_STRING:
	default:
		if (strings_are_fast) {
			copy_string(to, from, words);
			return;
		}
		break;
	}
	copy_words(to, from, words);
}
#else
void dmbridge_copy_calibrate(void)
{
}

static void copy_bulk(struct dmbridge *dev, u64 *to, const u8 *from, size_t words)
{
	copy_words(to, from, words);
}
#endif

/* Copies into a DMB, after everything that this CPU has written before. */
void dmbridge_copy(struct dmbridge *dev, void *to, const void *from, size_t size)
{
	size_t head = min_t(size_t, -(uintptr_t)to & 7, size);
	size_t words = (size - head) / 8;
	size_t tail = size - head - words * 8;

	smp_wmb();
	for (; head; head--)
		WRITE_ONCE(*(u8 *)to++, *(const u8 *)from++);
	if (words * 8 >= SMALL)
		copy_bulk(dev, to, from, words);
	else
		copy_words(to, from, words);
	to += words * 8;
	from += words * 8;
	for (; tail; tail--)
		WRITE_ONCE(*(u8 *)to++, *(const u8 *)from++);
}
