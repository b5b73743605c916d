"""The verdict: is a student as good as its teacher?"""
